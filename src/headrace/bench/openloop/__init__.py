"""Open-loop load over HTTP: shots, the client that fires them, servers as children, sweeps from idle to saturation."""

"""Output that fits a grammar or a schema."""

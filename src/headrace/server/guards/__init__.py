"""What every HTTP request passes first: ids and logs, hosts, keys, bounds."""

"""A hub on this machine: `server` answers its client, `repositories` writes what it serves."""

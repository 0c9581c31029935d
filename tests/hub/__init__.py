"""A hub on this machine: `server` answers its client, `repositories` and `evaluation` write what it serves."""

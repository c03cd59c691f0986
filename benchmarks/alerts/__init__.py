"""What looking for alerts costs, beside ten thousand organizations."""

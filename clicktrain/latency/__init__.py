"""Time: the timer, measured layers and networks, and the search for a structure that meets a latency."""

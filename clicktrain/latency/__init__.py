"""Time: one timer, tables over shapes, and the search for a structure that meets a latency."""

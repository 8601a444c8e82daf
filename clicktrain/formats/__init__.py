"""How weights and states are held in memory and on disk."""

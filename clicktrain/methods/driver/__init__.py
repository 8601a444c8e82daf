"""The driver: carries a method's decisions out in any training loop."""

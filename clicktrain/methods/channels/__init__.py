"""Parts of methods that remove channels."""

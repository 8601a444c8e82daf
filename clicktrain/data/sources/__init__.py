"""One module per kind of data set; each turns its files into a `Listing`."""

"""Where problems come from: files, hubs, and a generator of word problems."""

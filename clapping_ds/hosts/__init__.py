"""The frameworks whose training loops are extended: the only folders that import them."""

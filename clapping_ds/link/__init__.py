"""One link: channels, what their messages are made of, and the wire that carries them."""

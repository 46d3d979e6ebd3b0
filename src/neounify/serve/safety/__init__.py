"""Safety hooks of a server: protocol, word list, and loading by name (`hooks`)."""

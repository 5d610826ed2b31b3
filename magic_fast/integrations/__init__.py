"""Other libraries, each imported only when something of it is asked for."""

"""From files and hub ids to checked rows, conversations and loss masks."""

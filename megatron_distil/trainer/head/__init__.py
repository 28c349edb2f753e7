"""The vocabulary ends here. Every function equals its specification in ``algo`` on a vocabulary cut over tensor ranks."""

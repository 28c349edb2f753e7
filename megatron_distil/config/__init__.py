"""Configuration: a frozen tree, read from TOML without torch. ``schema`` says what there is, ``load`` reads, ``check`` rules."""

"""The page docs/models.md: what was tried on which backbone and fuser, and whether the page is still true."""

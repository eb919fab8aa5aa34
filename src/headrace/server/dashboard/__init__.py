"""The page that shows what the server does."""

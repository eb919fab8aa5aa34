"""OpenAI's routes: requests in, answers out."""

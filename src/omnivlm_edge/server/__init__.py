"""The HTTP server: OpenAI's interface, on the scheduler. Needs the extra `server`."""

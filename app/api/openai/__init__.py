"""The OpenAI images contract: what its clients send and read, both generations of it.

Source: the published OpenAPI description of the images endpoints, and what clients really do.
"""

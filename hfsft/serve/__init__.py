"""A web page to talk to a model, and an endpoint that speaks OpenAI's protocol."""

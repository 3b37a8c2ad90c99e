"""Rows of any format to messages, messages to token ids; chat templates and tokenizers."""

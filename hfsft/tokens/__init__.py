"""Rows of any format to messages, messages to token ids; chat templates and tokenizers.

`formats` reads a row as messages, `encoding` turns messages into token ids and marks the trained
ones, `templates` does so for chat templates that are not hfsft's, `tokenizer` trains or loads.
"""

"""Messages, written briefly."""


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


def system(content) -> dict:
    return {"role": "system", "content": content}


def tool(content, **names) -> dict:
    return {"role": "tool", "content": content} | names


def call(name, arguments, **number) -> dict:
    return number | {"type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls, content="") -> dict:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


HELLO = [user("Hi"), assistant("Hello")]

"""Sources to one mixture, base text to rows, a step's examples to packed rows, the audit.

- Conversations: `sources` loads rows, `rows` reads and checks them, `order` says which of them a
  run uses, `encoded` tokenizes those, and `mixture` puts it all together.
- Base text: `text` packs documents into cached rows, `stream` packs them while they are read.
- `packing` packs conversations and steps, `audit` counts, `preview` shows it before training.
"""

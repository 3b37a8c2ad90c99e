"""From documents to rows: text for base, or conversations that a teacher model writes."""

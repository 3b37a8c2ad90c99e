"""Sources to one mixture, base text to rows, a step's examples to packed rows, the audit."""

"""Every launch there is, once: for the C library and for the audit."""

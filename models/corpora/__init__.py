"""The built-in corpora: where their recordings come from, and how they become questions."""

"""The press shop: what prepares the chapters. No chapter's maths depends on it."""

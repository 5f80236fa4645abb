"""Where tokens come from: prefixes in, tokens out, never trees."""

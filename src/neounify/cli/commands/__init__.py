"""The commands: their options and help. Light to import; the work is imported when one runs."""

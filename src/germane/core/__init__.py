"""What every task stands on. Imports run downwards only: nothing here knows a task or a method."""

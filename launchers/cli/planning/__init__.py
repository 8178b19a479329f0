"""Commands that tell what a run would be, before any rank starts."""

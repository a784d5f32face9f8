"""The three families of operations, a module each; `metafast` has them all."""

"""Decentralized bilevel optimization: problems whose solution is known, and uses."""

"""Safety hooks, which may refuse prompts and images.

`hooks` is the protocol, `loading` makes hooks from the options of a command line, `wordlist` is the
hook that comes with the package.
"""

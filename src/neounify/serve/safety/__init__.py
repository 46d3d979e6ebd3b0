"""What stands around the model: hooks that may refuse, facts inside pictures, an invisible mark.

`hooks` and `loading` say what may be asked and shown, `wordlist` is the hook that comes with the
package; `provenance` writes and reads what a picture says of its origin, `watermark` marks pixels.
"""

"""The contract both sides share: ids, messages, topics, parameters, codecs, chunks, signatures, link."""

"""The generator of dropout's masks in Python's integers: the truth of every backend's."""


def philox(seed, row, block, rounds=7):
    """Philox4x32 in Python's integers, as the paper gives it."""
    key, counter = [seed & 0xFFFFFFFF, seed >> 32], [block, row & 0xFFFFFFFF, row >> 32, 0]
    for _ in range(rounds):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def mask_bits(seed, row, col):
    """The 16 bits that decide about an element."""
    return philox(seed, row, col // 8)[col % 8 // 2] >> 16 * (col % 2) & 0xFFFF

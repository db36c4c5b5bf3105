import attrs
import pytest

from swarmpull.swarm.peers import PeerContact, PeerKind
from swarmpull.wire.api import AnnounceReply
from swarmpull.wire.codec import decode, encode
from swarmpull.wire.handouts import encode_announce_reply


def contact(number):
    kind = PeerKind.ORIGIN if number % 7 == 0 else PeerKind.AGENT
    return PeerContact(f"{number:032x}", f"host-{number}.example.com", 7000 + number, kind)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 50, 300])
@pytest.mark.parametrize("position", [0, 127, 128, 70_000, 1 << 40])
def test_a_reply_is_encoded_byte_by_byte_as_the_codec_does(count, position):
    peers = tuple(map(contact, range(count)))
    reply = AnnounceReply(peers, 10.0, position=position, process="ab" * 8, age=3.25)
    for _ in range(2):  # the second time from what was kept
        packed = encode_announce_reply(peers, 10.0, position, "ab" * 8, 3.25)
        assert packed == encode(reply)
    assert decode(packed, AnnounceReply) == reply


def test_what_is_kept_with_a_contact_is_no_part_of_its_value():
    one, other = contact(1), contact(1)
    encode_announce_reply((one,), 1.0, 0, "", 0.0)
    assert one.encoded
    assert not other.encoded
    assert one == other
    assert hash(one) == hash(other)
    assert repr(one) == repr(other)
    assert encode(one) == encode(other)
    moved = attrs.evolve(one, host="elsewhere")
    assert encode_announce_reply((moved,), 1.0, 0, "", 0.0).count(b"elsewhere") == 1

"""Client of Tandem: fine-tune and serve language models on one pool of workers.

    from tandem_client import Client

    with Client("ipc:///home/me/.local/share/tandem/run/clients.sock") as client:  # tandem status
        for chunk in client.generate("smol", prompt="Hello"):
            print(chunk.text, end="", flush=True)
        print(client.chat("guide@2", [{"role": "user", "content": "Hello"}]).text)
"""

from tandem_client.client import Client
from tandem_client.errors import TandemError
from tandem_client.types import Chunk, Generation, Logprob, Message, Sampling, Usage

__all__ = [
    "Chunk",
    "Client",
    "Generation",
    "Logprob",
    "Message",
    "Sampling",
    "TandemError",
    "Usage",
]
__version__ = "0.1.0"

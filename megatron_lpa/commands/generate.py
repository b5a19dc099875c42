"""Continues prompts with a trained run.

    python tools/generate.py --run runs/tiny-lpa --prompt "The people of" --temperature 0.8 --top-p 0.95
    python tools/generate.py --run runs/tiny-lpa --prompt-file prompt.txt --temperature 0

Without a prompt a new document is started. The same seed gives the same text.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Sequence

from megatron_lpa.command_line import command, run_folders, take_runs, tool_parser
from megatron_lpa.errors import UserError, named
from megatron_lpa.evaluate.generation import Sampling, generate_text
from megatron_lpa.evaluate.trained import load_run, required_tokenizer
from megatron_lpa.files import read_text

logger = logging.getLogger(__name__)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = tool_parser(__doc__)
    take_runs(parser, "run folders or checkpoint folders")
    parser.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the one the run records")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be repeated")
    parser.add_argument(
        "--prompt-file", action="append", default=[], metavar="PATH", help="a file that is one prompt"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    parser.add_argument("--top-k", type=int, metavar="K", help="only the K most likely tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest share P")
    parser.add_argument("--seed", type=int, default=0, help="sample i uses seed + i (default: 0)")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="continuations per prompt")
    return parser.parse_args(argv)


def prompts_of(arguments: argparse.Namespace) -> list[str]:
    """All prompts, in the order --prompt, --prompt-file; one empty prompt when there are none.

    Raises:
        UserError: a file is none of text, or cannot be read.
        TryAgain: the disk does not give it.
    """
    prompts = list(arguments.prompt)
    for name in arguments.prompt_file:
        try:
            prompts.append("\n".join(re.split("\r\n|\r|\n", read_text(name))).rstrip("\n"))
        except OSError as error:
            raise UserError(f"--prompt-file {named(name)}: cannot be read ({error.strerror})") from error
        except UserError as error:
            raise type(error)(f"--prompt-file {error}") from error
    return prompts or [""]


@command()
def main(argv: Sequence[str]) -> int:
    """Print every sample; 0."""
    arguments = parse_arguments(argv)
    if arguments.num_samples < 1:
        raise UserError(f"--num-samples is {arguments.num_samples}; give 1 or more")
    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    prompts = prompts_of(arguments)
    folders = run_folders(arguments.run)
    several = len(folders) * len(prompts) * arguments.num_samples > 1
    for folder in folders:
        run = load_run(folder, arguments.step, arguments.tokenizer)
        tokenizer = required_tokenizer(run)
        for prompt in prompts:
            texts = generate_text(run.decoder, tokenizer, prompt, sampling, arguments.num_samples)
            for number, text in enumerate(texts):
                if several:
                    which = f"{folder}: " if len(folders) > 1 else ""
                    print(f"--- {which}{prompt[:40]!r}, seed {arguments.seed + number}")
                print(text, flush=True)
    return 0

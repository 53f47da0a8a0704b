/**
Arguments of the command line.
*/
import {InvalidArgumentError} from 'commander';

/** @returns a parser that throws InvalidArgumentError for anything but a whole number of these, both included. */
export function integer(low: number, high: number): (text: string) => number {
	return text => {
		const value = Number(text);
		if (!/^\d+$/.test(text) || value < low || value > high) {
			throw new InvalidArgumentError(`Expected an integer from ${low} to ${high}.`);
		}

		return value;
	};
}

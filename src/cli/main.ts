#!/usr/bin/env node
import process from 'node:process';
import {main} from './program.js';

const stop = new AbortController();
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
	process.once(signal, () => {
		// A second one ends the process at once.
		stop.abort();
	});
}

process.exitCode = await main(process.argv.slice(2), {
	stdout: text => process.stdout.write(text),
	stderr: text => process.stderr.write(text),
	signal: stop.signal,
});

/** What every benchmark does around its measurements. */
import {readFileSync} from 'node:fs';
import {arch, cpus, release} from 'node:os';
import {parseArgs} from 'node:util';
import {reasonOf} from '../src/errors.js';
import {must} from '../test/helpers/process.js';
import {World} from '../test/helpers/world.js';

export interface Machine {
	readonly kernel: string;
	readonly cpu: string;
	readonly iptables: string;
}

/** `-o table|json`, and counts with their defaults; ends the process for misuse. */
export function parseOptions<Count extends string>(usage: string, defaults: Readonly<Record<Count, number>>) {
	try {
		const counted = Object.fromEntries(Object.entries<number>(defaults).map(([name, value]) => [name, {type: 'string', default: String(value)} as const]));
		const {output, ...given} = parseArgs({options: {...counted, output: {type: 'string', short: 'o', default: 'table'}}}).values;
		const counts = Object.entries(given).map(([name, value]) => [name, Number(value)] as const);
		if ((output === 'table' || output === 'json') && counts.every(([, count]) => Number.isInteger(count) && count > 0)) {
			return {output, counts: Object.fromEntries(counts) as Readonly<Record<Count, number>>};
		}
	} catch {}

	console.error(`usage: ${usage}`);
	process.exit(2);
}

/** This process, and with it all that it will start, goes to one CPU. */
export function pinToLastCpu(): Machine {
	const [cpu] = /\d+$/.exec(/^Cpus_allowed_list:.*$/m.exec(readFileSync('/proc/self/status', 'utf8'))![0])!;
	must('taskset', '-acp', cpu, String(process.pid));
	return {
		kernel: `${release()} ${arch()}`,
		cpu: `${cpus()[0]!.model}, ${cpus().length} CPUs, all on CPU ${cpu}`,
		iptables: must('iptables', '--version').trim(),
	};
}

/**
Prints what `bench` returns. Whatever happens, and on Ctrl-C, nothing of the world is left.

@param bench - has to end soon after `stop` is aborted.
*/
export async function runBench(bench: (world: World, stop: AbortSignal) => Promise<string>): Promise<void> {
	const stop = new AbortController();
	for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
		process.once(signal, () => {
			stop.abort();
		});
	}

	const cleaners: Array<() => void | Promise<void>> = [];
	let failure: unknown;
	try {
		process.stdout.write(await bench(World.create({teardown: clean => cleaners.push(clean)}), stop.signal));
	} catch (error) {
		failure = error;
		process.exitCode = 1;
	} finally {
		for (const clean of cleaners) {
			await clean();
		}
	}

	// Ctrl-C ends what is running, too, so that it may look like a failure first.
	if (stop.signal.aborted) {
		process.exitCode = 130;
	} else if (failure !== undefined) {
		console.error(`bench: ${reasonOf(failure)}`);
	}
}

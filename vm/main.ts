/**
`npm run kernels [-- VERSION…]`: whether acceleration can be trusted on other kernels, and whether `auto` knows. Boots each of Debian's in QEMU; there the probes of `auto` run, and where
they are content, the short form of the integrity suite, accelerated. Ends with 1 if a byte was wrong or a stream hung on a kernel that `auto` accelerates on.
*/
import {toTable} from '../src/cli/format.js';
import {reasonOf} from '../src/errors.js';
import type {AccelerationFinding} from '../src/loader/acceleration-probe.js';
import {Kernels} from './kernels.js';
import {Userland} from './machine.js';

/** 6.18.12 loses bytes where bytes that come by TCP are put behind the redirected ones. */
const VERSIONS = ['6.1', '6.12', '6.18.12', 'newest'];
const TIMEOUT_MS = 30 * 60_000;

interface Probed {
	readonly oneQueue: boolean | null;
	readonly findings: readonly AccelerationFinding[];
}

interface Row {
	readonly kernel: string;
	readonly auto: string;
	readonly integrity: string;
	readonly good: boolean;
}

async function test(kernels: Kernels, userland: Userland, version: string, stop: AbortSignal): Promise<Row> {
	const kernel = kernels.get(version);
	const lines: string[] = [];
	console.log(`\n# ${kernel.release}`);
	const code = await userland.boot(kernel, line => {
		console.log(line);
		lines.push(line);
	}, TIMEOUT_MS, stop);
	const {oneQueue, findings} = JSON.parse(lines[0]!) as Probed;
	const failures = findings.filter(({failure}) => failure !== undefined).map(({name, failure}) => `${name} (${failure})`);
	return {
		kernel: kernel.release,
		auto: oneQueue === null ? `refuses: ${failures.join('; ')}` : `accelerates, with ${oneQueue ? 'one queue' : 'two queues'}`,
		integrity: lines.length > 1 ? lines.at(-1)! : '',
		good: code === 0,
	};
}

async function main(versions: readonly string[], stop: AbortSignal): Promise<boolean> {
	const kernels = new Kernels();
	const userland = new Userland('node dist/vm/guest.js');
	const rows: Row[] = [];
	try {
		for (const version of versions) {
			try {
				rows.push(await test(kernels, userland, version, stop));
			} catch (error) {
				stop.throwIfAborted();
				console.error(String(error));
				rows.push({kernel: version, auto: reasonOf(error), integrity: '', good: false});
			}
		}
	} finally {
		userland.remove();
	}

	console.log(`\n${toTable(rows.map(({good, ...row}) => ({...row, result: good ? 'right' : 'WRONG'})), '')}`);
	return rows.every(({good}) => good);
}

if (process.arch !== 'x64') {
	console.error('kernels: the machine that is emulated runs this build, which has to be for x86-64');
	process.exit(2);
}

const stop = new AbortController();
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
	process.once(signal, () => {
		stop.abort();
	});
}

try {
	process.exitCode = await main(process.argv.length > 2 ? process.argv.slice(2) : VERSIONS, stop.signal) ? 0 : 1;
} catch (error) {
	console.error(`kernels: ${reasonOf(error)}`);
	process.exitCode = stop.signal.aborted ? 130 : 1;
}

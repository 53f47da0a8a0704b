import {readFileSync} from 'node:fs';
import {fileURLToPath} from 'node:url';
import test from 'ava';
import {Running, must} from '../helpers/process.js';

const BENCH = fileURLToPath(new URL('../../bench/traffic.js', import.meta.url));

interface ProgramTime {
	readonly program: string;
	readonly runs: number;
	readonly ns: number;
}

interface Report {
	readonly cells: ReadonlyArray<Readonly<Record<string, unknown>> & {
		readonly topology: string;
		readonly variant: string;
		readonly redirected: number;
		readonly programs?: Readonly<Record<'exchange' | 'connection', readonly ProgramTime[]>>;
	}>;
	readonly targets: ReadonlyArray<{readonly ratio: number}>;
}

test('the traffic benchmark accelerates held connections, and only those that are to be, and cleans up', async t => {
	const bench = Running.start(process.execPath, [BENCH, '--rounds', '1', '--exchanges', '200', '--connections', '20', '--mebibytes', '1', '-o', 'json']);
	t.is(await bench.ended, 0, bench.stderr);
	const {cells, targets} = JSON.parse(bench.stdout) as Report;
	t.deepEqual(cells.map(({topology, variant}) => `${topology} ${variant}`), [
		'direct direct', ...['iptables', 'redirect only', 'accelerated'].flatMap(variant => [`one hop ${variant}`, `all local ${variant}`]),
	]);
	for (const cell of cells) {
		const title = `${cell.topology} ${cell.variant}`;
		for (const metric of ['exchangeP50', 'exchangeP99', 'connectRate', 'connectP99', 'streamRate', 'chattyStreamRate']) {
			t.true(cell[metric] as number > 0, `${title} ${metric}`);
		}

		const runs = (each: 'exchange' | 'connection', program: string) => cell.programs?.[each].find(time => time.program === program)?.runs ?? 0;
		t.is(cell.redirected > 0, cell.variant === 'accelerated', title);
		t.is(runs('exchange', 'message') > 1, cell.variant === 'accelerated', title);
		t.is(runs('connection', 'message'), 0, title);
		t.is(runs('connection', 'connect4') >= 1, cell.programs !== undefined, title);
	}

	t.true(targets.every(({ratio}) => ratio > 0));
	t.notRegex(must('ip', 'netns', 'list') + readFileSync('/proc/self/mounts', 'utf8'), new RegExp(`sst-${bench.child.pid}-`));
});

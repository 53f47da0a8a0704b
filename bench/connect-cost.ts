/**
`npm run bench`: how long connect(2) takes with lists of excluded ranges, in pods under sidestep, under Istio's iptables rules, and without capture. All sides
in one run, round by round, on one CPU; nothing of the host's own network is touched, and everything goes at the end, also on Ctrl-C.
*/
import {setImmediate as nextTurn} from 'node:timers/promises';
import {toJson, toTable} from '../src/cli/format.js';
import {openDatapath} from '../src/loader/datapath.js';
import {SIDECAR_ID, sidecarRules} from '../test/helpers/istio-rules.js';
import type {As, Pod, World} from '../test/helpers/world.js';
import {parseOptions, pinToLastCpu, runBench} from './frame.js';
import {scatteredRanges} from './ranges.js';
import {Series, type Latency, type RunTime} from './series.js';

const USAGE = 'connect-cost [-o table|json] [--rounds N] [--connections N]';
const LIST_LENGTHS = [0, 10, 100, 1000];
/** Of the server's addresses, the one that is in the last range of each list. */
const EXCLUDED = {address: '10.77.0.170', range: '10.77.0.168/29'};
const PORT = 8080;

interface Cell {
	readonly ranges: number;
	readonly destination: 'captured' | 'excluded';
	readonly iptables: Series;
	readonly sidestep: Series;
}

type Report = Awaited<ReturnType<typeof bench>>;

const serverAt = (address: string) => [`${address}:${PORT}`, `{"server":"${address}:${PORT}"`] as const;
const proxyFor = (address: string) => [`${address}:${PORT}`, `{"original_dst":"${address}:${PORT}"`] as const;

async function startProxy(pod: Pod, as: As): Promise<void> {
	const proxy = pod.start([pod.world.program('acceptor'), '0.0.0.0:15001'], {...as, uid: SIDECAR_ID, gid: SIDECAR_ID});
	await proxy.until('ready', () => proxy.stdout.includes('"ready":true'));
}

/**
Each list in a pod of each side.

@param captured - where sidestep's programs are attached: nobody else pays for them.
*/
async function buildCells(world: World, server: Pod, captured: Required<Pick<As, 'cgroup'>>): Promise<readonly Cell[]> {
	const cells: Cell[] = [];
	const entries: object[] = [];
	for (const ranges of LIST_LENGTHS) {
		const list = ranges > 0 ? [...scatteredRanges(ranges - 1), EXCLUDED.range].join(',') : '';
		const [iptables, sidestep] = [world.pod(`iptables-${ranges}`), world.pod(`sidestep-${ranges}`)];
		sidecarRules(iptables, {excludeOutboundIPRanges: list});
		entries.push({name: `bench/${sidestep.name}`, netns: sidestep.netns, mode: 'sidecar', annotations: {'traffic.sidecar.istio.io/excludeOutboundIPRanges': list}});
		await startProxy(iptables, {});
		await startProxy(sidestep, captured);
		const cell = (destination: Cell['destination'], [to, greeting]: readonly [string, string]): Cell => (
			{ranges, destination, iptables: new Series(iptables, to, greeting), sidestep: new Series(sidestep, to, greeting, captured)}
		);
		cells.push(cell('captured', proxyFor(server.ipv4)), ...ranges > 0 ? [cell('excluded', serverAt(EXCLUDED.address))] : []);
	}

	await world.agent(entries, ['--cgroup', captured.cgroup]);
	return cells;
}

async function bench(world: World, {rounds, connections}: {readonly rounds: number; readonly connections: number}, stop: AbortSignal) {
	const machine = pinToLastCpu();
	const captured = {cgroup: world.subCgroup('sidestep')};
	const server = world.pod('server', {more: [EXCLUDED.address]});
	await server.server(`0.0.0.0:${PORT}`);
	const cells = await buildCells(world, server, captured);
	const bare = world.pod('bare');
	const withoutCapture = new Series(bare, ...serverAt(server.ipv4));
	const notEnrolled = new Series(bare, ...serverAt(server.ipv4), captured);

	const all = [withoutCapture, notEnrolled, ...cells.flatMap(({iptables, sidestep}) => [iptables, sidestep])];
	for (let round = 0; round < rounds; round++) {
		for (const series of round % 2 === 0 ? all : all.toReversed()) {
			series.measure(connections);
			await nextTurn(undefined, {signal: stop});
		}
	}

	const datapath = openDatapath(world.bpffs);
	const report = {
		unit: 'ns',
		...machine,
		roundCount: rounds,
		connections,
		cells: cells.map(({ranges, destination, iptables, sidestep}) => ({
			ranges,
			destination,
			iptables: iptables.latency,
			sidestep: sidestep.latency,
			ratio: sidestep.ratioTo(iptables),
			runTime: sidestep.runTime(datapath, connections),
			rounds: {iptables: iptables.rounds, sidestep: sidestep.rounds},
		})),
		withoutCapture: withoutCapture.latency,
		notEnrolled: notEnrolled.latency,
		notEnrolledRunTime: notEnrolled.runTime(datapath, connections),
	};
	datapath.close();
	return report;
}

function toText({kernel, cpu, iptables, roundCount, connections, cells, withoutCapture, notEnrolled, notEnrolledRunTime}: Report): string {
	const us = (ns: number) => (ns / 1000).toFixed(1);
	const columns = (name: string, {connect}: Latency) => ({[`${name} p50`]: us(connect.p50), [`${name} p99`]: us(connect.p99)});
	const runTime = (time: RunTime | undefined) => ({'connect4 ns': time?.connect4.toFixed(0), 'all programs ns': time?.all.toFixed(0)});
	const compared = cells.map(cell => ({
		ranges: cell.ranges, destination: cell.destination,
		...columns('iptables', cell.iptables), ...columns('sidestep', cell.sidestep),
		'p50 ratio': cell.ratio.connect.p50.toFixed(2), 'p99 ratio': cell.ratio.connect.p99.toFixed(2), 'lifetime ratio': cell.ratio.lifetime.p50.toFixed(2),
		...runTime(cell.runTime),
	}));
	const forScale = [
		{pod: 'without capture', ...columns('connect', withoutCapture), ...runTime(undefined)},
		{pod: 'not enrolled, on a node with sidestep', ...columns('connect', notEnrolled), ...runTime(notEnrolledRunTime)},
	];
	return [
		`kernel ${kernel}; ${cpu}; ${iptables}`,
		`connect(2) in µs, medians of ${roundCount} rounds of ${connections} connections; lifetime: from socket(2) to close(2), p50; BPF run time of one connection`,
		'',
		toTable(compared, ''),
		toTable(forScale, ''),
	].join('\n');
}

const {output, counts} = parseOptions(USAGE, {rounds: 20, connections: 1000});
await runBench(async (world, stop) => {
	const report = await bench(world, counts, stop);
	return output === 'json' ? toJson(report) : toText(report);
});

/**
The real Envoy as a sidecar, configured as Istio configures it, in two sibling pods: one under Istio's iptables rules, one under sidestep. The application,
its peer and whoever reads the access log have to see the same.
*/
import {isDeepStrictEqual} from 'node:util';
import {fileURLToPath} from 'node:url';
import test, {type ExecutionContext} from 'ava';
import {SIDECAR_ID, sidecarRules, type SidecarOptions} from '../helpers/istio-rules.js';
import {SERVICE, startEnvoySidecar, type Sidecar, type SidecarLine} from '../helpers/proxies.js';
import {World, type As, type ClientResult, type Pod, type ProxyLine} from '../helpers/world.js';

const STREAM_CHILD = fileURLToPath(new URL('../helpers/stream-child.js', import.meta.url));
const STREAM_MIB = 8;
/** Each way, over both families. */
const HELD = 200;

const FAR_PORTS = [8080, 8443];
const POD_PORTS = [8081, 8082, 15_008, 15_020, 15_021, 15_090];
/** One socket for both families, as many applications have it. */
const DUAL_STACK = '[::]:8083';

const SIDECAR: As = {uid: SIDECAR_ID, gid: SIDECAR_ID};

interface Side {
	readonly pod: Pod;
	/** What the names in the cases stand for. */
	readonly addresses: Readonly<Record<string, string>>;
}

interface Case {
	readonly title: string;
	readonly to: string;
	/** By default the pod itself. */
	readonly from?: 'far';
	readonly options?: readonly string[];
	readonly as?: As;
	/** Envoy's filter chains, in the order of the bytes. */
	readonly through: ReadonlyArray<SidecarLine['chain']>;
	/** The client's address as the server in the end sees it. */
	readonly sees?: string;
	/** What the client has in the end; by default `ok`. */
	readonly outcome?: string;
}

const MAPPED = ['--family', 'mapped'];

const CASES: readonly Case[] = [
	{title: 'out, IPv4', to: 'FAR4:8080', through: ['outbound'], sees: 'OWN4'},
	{title: 'out, IPv6', to: '[FAR6]:8080', through: ['outbound'], sees: '[OWN6]'},
	{title: 'out, IPv4 from an IPv6 socket', to: 'FAR4:8080', options: MAPPED, through: ['outbound'], sees: 'OWN4'},
	{title: 'out, non-blocking', to: 'FAR4:8080', options: ['--nonblock'], through: ['outbound'], sees: 'OWN4'},
	{title: 'out, bound address', to: '[FAR6]:8080', options: ['--bind', '[OWN6]:0'], through: ['outbound'], sees: '[OWN6]'},
	{title: 'out, nobody listens', to: 'FAR4:9', through: ['outbound'], outcome: 'EOF'},
	{title: 'out, nobody listens, IPv6', to: '[FAR6]:9', through: ['outbound'], outcome: 'EOF'},
	{title: 'out, to somebody else\'s 15001: Envoy takes it for its own', to: 'FAR4:15001', through: ['outbound-blackhole'], outcome: 'EOF'},
	{title: 'out, an excluded port', to: 'FAR4:8443', through: [], sees: 'OWN4'},
	{title: 'out, an excluded port, IPv6', to: '[FAR6]:8443', through: [], sees: '[OWN6]'},
	{title: 'out, an excluded port, from an IPv6 socket', to: 'FAR4:8443', options: MAPPED, through: [], sees: 'OWN4'},
	{title: 'out, an excluded range', to: 'OTHER4:8080', through: [], sees: 'OWN4'},
	{title: 'out, an excluded range, IPv6', to: '[OTHER6]:8080', through: [], sees: '[OWN6]'},
	{title: 'out, Envoy\'s own', to: 'FAR4:8080', as: SIDECAR, through: [], sees: 'OWN4'},
	{title: 'in, IPv4', from: 'far', to: 'OWN4:8081', through: ['inbound-ipv4'], sees: '127.0.0.6'},
	{title: 'in, IPv6', from: 'far', to: '[OWN6]:8081', through: ['inbound-ipv6'], sees: '[::6]'},
	{title: 'in, IPv4, the application listens on [::]', from: 'far', to: 'OWN4:8083', through: ['inbound-ipv4'], sees: '[::ffff:127.0.0.6]'},
	{title: 'in, an excluded port', from: 'far', to: 'OWN4:8082', through: [], sees: 'FAR4'},
	{title: 'in, an excluded port, IPv6', from: 'far', to: '[OWN6]:8082', through: [], sees: '[FAR6]'},
	{title: 'in, nobody listens', from: 'far', to: 'OWN4:9', through: ['inbound-ipv4'], outcome: 'EOF'},
	{title: 'in, nobody listens, IPv6', from: 'far', to: '[OWN6]:9', through: ['inbound-ipv6'], outcome: 'EOF'},
	{title: 'in, to 15001', from: 'far', to: 'OWN4:15001', through: ['inbound-ipv4', 'outbound-blackhole'], outcome: 'EOF'},
	{title: 'in, to 15006', from: 'far', to: '[OWN6]:15006', through: ['inbound-blackhole'], outcome: 'EOF'},
	...[15_008, 15_020, 15_021, 15_090].flatMap((port): Case[] => [
		{title: `in, ${port}`, from: 'far', to: `OWN4:${port}`, through: [], sees: 'FAR4'},
		{title: `in, ${port}, IPv6`, from: 'far', to: `[OWN6]:${port}`, through: [], sees: '[FAR6]'},
	]),
	{title: 'to its own address', to: 'OWN4:8081', through: [], sees: 'OWN4'},
	{title: 'to its own address, IPv6', to: '[OWN6]:8081', through: [], sees: '[OWN6]'},
	{title: 'to its own address from an IPv6 socket', to: 'OWN4:8081', options: MAPPED, through: [], sees: 'OWN4'},
	{title: 'to its own address, nobody listens', to: 'OWN4:9', through: [], outcome: 'ECONNREFUSED'},
	{title: 'to its own 15006', to: 'OWN4:15006', through: ['inbound-blackhole'], outcome: 'EOF'},
	{title: 'to 127.0.0.1', to: '127.0.0.1:8082', through: [], sees: '127.0.0.1'},
	{title: 'to a service whose endpoint is the pod', to: `${SERVICE[4]}:${SERVICE.port}`, through: ['service', 'inbound-ipv4'], sees: '127.0.0.6'},
	{title: 'to a service whose endpoint is the pod, IPv6', to: `[${SERVICE[6]}]:${SERVICE.port}`, through: ['service', 'inbound-ipv6'], sees: '[::6]'},
	{title: 'to a service whose endpoint is the pod, from an IPv6 socket', to: `${SERVICE[4]}:${SERVICE.port}`, options: MAPPED, through: ['service', 'inbound-ipv4'], sees: '127.0.0.6'},
];

const LISTED: readonly Case[] = [
	{title: 'in, a listed port', from: 'far', to: 'OWN4:8081', through: ['inbound-ipv4'], sees: '127.0.0.6'},
	{title: 'in, a listed port, IPv6', from: 'far', to: '[OWN6]:8081', through: ['inbound-ipv6'], sees: '[::6]'},
	{title: 'in, 15020, when listed', from: 'far', to: '[OWN6]:15020', through: ['inbound-ipv6'], sees: '[::6]'},
	{title: 'in, a port that is not listed', from: 'far', to: 'OWN4:8082', through: [], sees: 'FAR4'},
	{title: 'in, a port that is not listed, IPv6', from: 'far', to: '[OWN6]:8082', through: [], sees: '[FAR6]'},
	{title: 'in, nobody listens, not listed', from: 'far', to: 'OWN4:9', through: [], outcome: 'ECONNREFUSED'},
	{title: 'out', to: 'FAR4:8080', through: ['outbound'], sees: 'OWN4'},
	{title: 'to a service whose endpoint is the pod', to: `${SERVICE[4]}:${SERVICE.port}`, through: ['service', 'inbound-ipv4'], sees: '127.0.0.6'},
];

const WITHOUT_ENVOY: readonly Case[] = [
	{title: 'out', to: 'FAR4:8080', through: [], outcome: 'ECONNREFUSED'},
	{title: 'out, IPv6', to: '[FAR6]:8080', through: [], outcome: 'ECONNREFUSED'},
	{title: 'out, IPv4 from an IPv6 socket', to: 'FAR4:8080', options: MAPPED, through: [], outcome: 'ECONNREFUSED'},
	{title: 'in', from: 'far', to: 'OWN4:8081', through: [], outcome: 'ECONNREFUSED'},
	{title: 'in, IPv6', from: 'far', to: '[OWN6]:8081', through: [], outcome: 'ECONNREFUSED'},
	{title: 'in, 15020', from: 'far', to: 'OWN4:15020', through: [], sees: 'FAR4'},
	{title: 'Envoy\'s own', to: 'FAR4:8080', as: SIDECAR, through: [], sees: 'OWN4'},
];

const apart = (pod: Pod, ports: readonly number[]) => ports.flatMap(port => [`0.0.0.0:${port}`, `[${pod.ipv6}]:${port}`]);

/** Two pods, the first under iptables, the second enrolled, and two outside the mesh. */
async function pair(t: ExecutionContext, options: (other: Pod) => SidecarOptions): Promise<{readonly far: Pod; readonly sides: readonly Side[]; readonly capture: () => Promise<void>}> {
	const world = World.create(t);
	const far = world.pod('far');
	const other = world.pod('other');
	for (const pod of [far, other]) {
		await pod.server(...apart(pod, FAR_PORTS));
	}

	const [reference, ours] = [world.pod('iptables'), world.pod('sidestep')];
	for (const pod of [reference, ours]) {
		await pod.server(...apart(pod, POD_PORTS), DUAL_STACK);
	}

	return {
		far,
		sides: [reference, ours].map(pod => ({pod, addresses: {FAR4: far.ipv4, FAR6: far.ipv6, OTHER4: other.ipv4, OTHER6: other.ipv6, OWN4: pod.ipv4, OWN6: pod.ipv6}})),
		capture: async () => {
			const annotations = Object.fromEntries(Object.entries(options(other)).map(([name, value]) => [`traffic.sidecar.istio.io/${name}`, value]));
			sidecarRules(reference, options(other));
			await world.agent([{name: `test/${ours.name}`, netns: ours.netns, mode: 'sidecar', annotations}]);
		},
	};
}

/**
What sidestep does otherwise, as the README says, and is not compared. Of a line of the log:

- `accepted`, the address that Envoy's socket itself has: REDIRECT makes it 127.0.0.1, ::1 or the pod's own, at 15001 or 15006. Under sidestep what is captured
  on its way out goes to an address of 127/8 that belongs to its destination, or to the pod's own IPv6 address, at 15001; what Envoy sends to its own pod
  keeps its address; what comes in keeps its port too.
*/
function comparedLine({accepted, ...line}: SidecarLine): object {
	return line;
}

/** Likewise, of a client: a connect that failed leaves the source bound. */
function comparedLocal({outcome, local}: ClientResult): string {
	return outcome === 'ok' ? local : '';
}

function fill({addresses}: Side, text: string): string {
	return text.replaceAll(/[A-Z]+[46]/g, name => addresses[name] ?? name);
}

/** JSON with names instead of addresses, and one word for every port that the kernel chose. */
function plain({addresses}: Side, view: unknown): string {
	const named = Object.entries(addresses).reduce((text, [name, address]) => text.replaceAll(new RegExp(`\\b${address.replaceAll('.', '\\.')}\\b`, 'g'), name), JSON.stringify(view));
	return named.replaceAll(/:[3-6]\d{4}"/g, ':RANDOM"');
}

function logged(lines: readonly SidecarLine[], through: Case['through']): readonly object[] {
	return [...lines].sort((a, b) => through.indexOf(a.chain) - through.indexOf(b.chain)).map(line => comparedLine(line));
}

/** What everybody saw. */
async function look(side: Side, sidecar: Sidecar | undefined, far: Pod, {from, to, options = [], as, through}: Case) {
	const client = (from === 'far' ? far : side.pod).client(fill(side, to), ['--timeout', '1500', ...options.map(option => fill(side, option))], as);
	const {outcome, stage, echo, peer, hello} = client;
	const lines = await sidecar?.lines(through.length) ?? [];
	return {
		outcome, chains: lines.map(({chain}) => chain).sort(), sees: hello?.peer,
		rest: {stage, echo, peer, local: comparedLocal(client), server: hello?.server, log: logged(lines, through)},
	};
}

async function compareCases(t: ExecutionContext, cases: readonly Case[], far: Pod, sides: readonly Side[], sidecars: readonly Sidecar[]): Promise<void> {
	const wrong: string[] = [];
	for (const action of cases) {
		const views: string[] = [];
		for (const [index, side] of sides.entries()) {
			const view = await look(side, sidecars[index], far, action);
			const {outcome = 'ok', through, sees} = action;
			const seen = plain(side, view.sees ?? '').replace(/:\w+"$/, '"');
			if (view.outcome !== outcome || !isDeepStrictEqual(view.chains, [...through].sort()) || seen !== JSON.stringify(sees ?? '')) {
				wrong.push(`${action.title}: ${side.pod.name} is not what the case expects: ${plain(side, view)}`);
			}

			views.push(plain(side, view));
		}

		if (views[0] !== views[1]) {
			wrong.push(`${action.title}: iptables ${views[0]}, sidestep ${views[1]}`);
		}
	}

	for (const [index, {running, lines}] of sidecars.entries()) {
		await running.stop();
		for (const line of await lines(0)) {
			wrong.push(`${sides[index]!.pod.name}: more than the cases say went through Envoy: ${JSON.stringify(line)}`);
		}
	}

	t.deepEqual(wrong, []);
}

async function startEnvoys(sides: readonly Side[]): Promise<Sidecar[]> {
	const sidecars: Sidecar[] = [];
	for (const {pod} of sides) {
		sidecars.push(await startEnvoySidecar(pod));
	}

	return sidecars;
}

test.serial('Envoy, its log and its pod see the same under sidestep and under iptables', async t => {
	const {far, sides, capture} = await pair(t, ({ipv4, ipv6}) => ({excludeOutboundPorts: '8443', excludeOutboundIPRanges: `${ipv4}/32,${ipv6}/128`, excludeInboundPorts: '8082'}));
	await capture();
	await compareCases(t, CASES, far, sides, await startEnvoys(sides));
});

test.serial('so they do with a list of inbound ports, and Envoy started before capture', async t => {
	const {far, sides, capture} = await pair(t, () => ({includeInboundPorts: '8081,15020'}));
	const sidecars = await startEnvoys(sides);
	await capture();
	await compareCases(t, LISTED, far, sides, sidecars);
});

test.serial('without Envoy all that is captured is refused, in both', async t => {
	const {far, sides, capture} = await pair(t, () => ({}));
	await capture();
	await compareCases(t, WITHOUT_ENVOY, far, sides, []);
});

interface Stream {
	readonly peer: string;
	readonly sent: string;
	readonly received: string;
	readonly receivedBytes: number;
}

test.serial(`${STREAM_MIB} MiB each way come through as they were, and ${HELD} connections each way are held, as under iptables`, async t => {
	const {far, sides, capture} = await pair(t, () => ({}));
	await capture();
	const sidecars = await startEnvoys(sides);
	const bytes = STREAM_MIB * 1024 * 1024;
	const ways = (side: Side) => [{from: side.pod, to: 'FAR4'}, {from: side.pod, to: 'FAR6'}, {from: far, to: 'OWN4'}, {from: far, to: 'OWN6'}].map(({from, to}) => ({from, host: side.addresses[to]!, port: from === far ? 8081 : 8080}));

	const streams = await Promise.all(sides.map(async (side, index) => {
		const running = ways(side).map(({from, host, port}) => from.start([process.execPath, STREAM_CHILD, host, String(port), String(bytes)]));
		await Promise.all(running.map(async ({ended}) => ended));
		const results = running.flatMap(child => child.lines<Stream>());
		t.is(results.length, 4, running.map(({stderr}) => stderr).join());
		for (const {sent, received, receivedBytes} of results) {
			t.is(receivedBytes, bytes);
			t.is(received, sent);
		}

		return plain(side, [results.map(({peer}) => peer), summary(await sidecars[index]!.lines(4))]);
	}));
	t.is(streams[1], streams[0]);

	const held = await Promise.all(sides.map(async (side, index) => {
		const clients = ways(side).map(({from, host, port}) => from.startClients([host.includes(':') ? `[${host}]:${port}` : `${host}:${port}`], ['--count', String(HELD / 2), '--hold']));
		for (const client of clients) {
			await client.until('all are connected', () => client.lines().length === HELD / 2);
		}

		for (const client of clients) {
			client.child.stdin!.end('still there\n');
			await client.ended;
			t.deepEqual(client.lines().at(-1), {round: 1, ok: HELD / 2, failed: 0});
		}

		return plain(side, summary(await sidecars[index]!.lines(2 * HELD)));
	}));
	t.is(held[1], held[0]);
});

/** Each line once, and how often it was there. */
function summary(lines: readonly SidecarLine[]): ReadonlyArray<readonly [line: string, count: number]> {
	const counts = new Map<string, number>();
	for (const line of lines) {
		const text = JSON.stringify(comparedLine(line));
		counts.set(text, (counts.get(text) ?? 0) + 1);
	}

	return [...counts].sort();
}

/** tools/istio-iptables/pkg/validation of istio/istio: listens, as the sidecar's user, on loopback only, and calls its own 127.0.0.6 or ::6 at 15002. */
test.serial('Istio\'s own check of the redirection passes', async t => {
	const {sides, capture} = await pair(t, () => ({}));
	await capture();
	for (const [listen, probed] of [['127.0.0.1', '127.0.0.6'], ['[::1]', '[::6]']] as const) {
		for (const {pod} of sides) {
			const check = await pod.proxy(['--no-relay', '--brief', '--listen', `${listen}:15001`, '--listen', `${listen}:15006`], SIDECAR);
			const {outcome, stage} = pod.client(`${probed}:15002`, ['--bind', `${listen}:0`], SIDECAR);
			t.deepEqual({outcome, stage}, {outcome: 'EOF', stage: 'hello'}, pod.name);
			await check.until('it was reached', () => check.stdout.includes('peer'));
			const [line] = check.lines<ProxyLine>().filter(({peer}) => peer);
			t.deepEqual([line?.peer.replace(/:\d+$/, ''), line?.local, line?.original_dst], [listen, `${listen}:15006`, `${probed}:15002`], pod.name);
		}
	}
});

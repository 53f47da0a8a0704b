import {Counter, Gauge, type Registry} from 'prom-client';
import type {CniInstaller} from '../cni/install.js';
import type {CniServer} from '../cni/server.js';
import type {KubernetesClient} from '../kubernetes/client.js';
import type {EventWriter, StatusWriter} from '../kubernetes/status.js';
import type {ZdsServer} from '../zds/server.js';
import type {NodePods} from './pods.js';

export interface NodeParts {
	readonly client: KubernetesClient;
	readonly pods: NodePods;
	readonly zds: ZdsServer;
	readonly status: StatusWriter;
	readonly events: EventWriter;
	readonly cni: () => CniServer | undefined;
	readonly installer: CniInstaller | undefined;
}

type Labels = Readonly<Record<string, string>>;

/** What the parts count by themselves, read when somebody asks. */
export function registerNodeMetrics(registry: Registry, {client, pods, zds, status, events, cni, installer}: NodeParts): void {
	const counter = (name: string, help: string, read: () => Iterable<readonly [Labels, number]>, labelNames: readonly string[] = []) => {
		new Counter({
			name, help, labelNames, registers: [registry],
			collect() {
				this.reset();
				for (const [labels, value] of read()) {
					this.inc(labels, value);
				}
			},
		});
	};

	const gauge = (name: string, help: string, read: () => Iterable<readonly [Labels, number]>, labelNames: readonly string[] = []) => {
		new Gauge({
			name, help, labelNames, registers: [registry],
			collect() {
				this.reset();
				for (const [labels, value] of read()) {
					this.set(labels, value);
				}
			},
		});
	};

	const reflectors = () => Object.entries(pods.reflectors);
	counter('sidestep_api_requests_total', 'Requests to the API server, retries and watches among them', () => [[{}, client.requests]]);
	counter('sidestep_api_errors_total', 'Lists and watches that failed', () => reflectors().flatMap(([resource, {counters}]) => Object.entries(counters.errors).map(([kind, count]) => [{resource, kind}, count] as const)), ['resource', 'kind']);
	counter('sidestep_api_events_total', 'Events of watches that were taken', () => reflectors().map(([resource, {counters}]) => [{resource}, counters.events]), ['resource']);
	gauge('sidestep_api_silence_seconds', 'Since the API server last said something that was understood', () => reflectors().flatMap(([resource, {lastContactMs}]) => lastContactMs === undefined ? [] : [[{resource}, (performance.now() - lastContactMs) / 1000] as const]), ['resource']);
	gauge('sidestep_api_synced', '1 once all pods and namespaces that there were are known', () => [[{}, pods.isSynced ? 1 : 0]]);
	counter('sidestep_status_writes_total', 'Writes of the annotation ambient.istio.io/redirection', () => Object.entries(status.counters).map(([result, count]) => [{result}, count]), ['result']);
	counter('sidestep_events_written_total', 'Kubernetes events about pods', () => Object.entries(events.counters).map(([result, count]) => [{result}, count]), ['result']);
	gauge('sidestep_ztunnels', 'ztunnels that are connected', () => [[{}, zds.connections.length]]);
	counter('sidestep_zds_requests_total', 'Messages to ztunnels', () => Object.entries(zds.counters.sent).map(([kind, count]) => [{kind}, count]), ['kind']);
	counter('sidestep_zds_refusals_total', 'Workloads that a ztunnel refused', () => [[{}, zds.counters.nacks]]);
	counter('sidestep_zds_drops_total', 'Connections of ztunnels that ended', () => Object.entries(zds.counters.dropped).map(([reason, count]) => [{reason}, count]), ['reason']);
	counter('sidestep_cni_calls_total', 'Calls of the CNI plugin', () => Object.entries(cni()?.counters ?? {}).flatMap(([command, results]) => Object.entries(results).map(([result, count]) => [{command, result}, count] as const)), ['command', 'result']);
	gauge('sidestep_cni_installed', '1 when the CNI plugin and its entry are in place', () => installer ? [[{}, installer.state.installed ? 1 : 0]] : []);
}
